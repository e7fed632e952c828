"""Where imprinting meets a Trainer: our module, and yours (callback, attach, extend)."""
