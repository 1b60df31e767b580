"""Building blocks chosen by device, each beside its plain twin that tests hold equal."""
