"""The life of an orchestrator as others see it: `presence` says its status, `access` who a key is. Pure."""
