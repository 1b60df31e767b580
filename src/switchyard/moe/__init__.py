"""The conditional layer: routers decide, dispatchers move, experts compute."""
