"""A cluster's graphs, compiled and executed without a cluster."""
