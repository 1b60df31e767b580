"""Compiles and executes a cluster's graphs without a cluster."""
