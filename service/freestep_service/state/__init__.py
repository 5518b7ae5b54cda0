"""A shard's memory and its one writer. Knows neither Redis nor HTTP."""
