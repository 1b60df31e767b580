"""The public library: what `import switchyard as sw` offers. Everything in here is thin over the other packages."""
