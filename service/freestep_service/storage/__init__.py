"""Files and checksums: checkpoints and what else outlives a process. Knows neither Redis nor HTTP."""
