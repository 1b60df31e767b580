"""Takes in and gives back what other tools read and write."""
