"""Solvers: the loop in `base`, first order in `descent`, second order in `gauss_newton`."""
