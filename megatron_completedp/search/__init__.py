"""The search for per-module hyperparameters on the proxy, as an Optuna study."""
