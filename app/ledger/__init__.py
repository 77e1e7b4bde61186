"""Everything in Redis: the orders, their clock and history, and the scripts that change them."""
