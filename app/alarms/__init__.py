"""When to call somebody: signs read off the vital signs, and when a sign becomes an alarm. No I/O, no clock."""
