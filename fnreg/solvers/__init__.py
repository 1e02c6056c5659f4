"""Solvers: what they share in `base`, the loop of all of them in `loop`; first order in `descent`, second order in
`gauss_newton`, for few parameters, and `newton_cg`, quasi-Newton in `lbfgs`."""
