"""Makes reports, tables and pictures of runs, and shows a run at work. Only `inspection` uses MindSpore."""
