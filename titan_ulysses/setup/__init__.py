"""From a config to a model that is wrapped and sharded."""
