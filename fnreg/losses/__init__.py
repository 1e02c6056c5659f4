"""Losses: equations in `functional`, terms that scale and add in `terms`."""
