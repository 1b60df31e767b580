"""Estimates the costs of a configuration on a cluster, without a cluster."""
