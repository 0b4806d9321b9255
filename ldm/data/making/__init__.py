"""Making shards: sources that list pictures, one pure function that prepares one, and a journal that writes them."""
