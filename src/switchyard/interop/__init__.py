"""Takes weights from elsewhere and gives them back: other libraries, dense models made sparse and sparse made dense."""
