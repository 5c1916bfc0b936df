"""The library inside of other trainers. What they need is imported when they are used."""
