"""Ensembles of networks and cubes of their activity."""
