"""What an order and the whole receiver look like to people, as data and words; commands print it, pages show it."""
