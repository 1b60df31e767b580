"""What a configuration costs on a cluster, found without one."""
