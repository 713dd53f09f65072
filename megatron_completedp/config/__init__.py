"""Run configuration: frozen dataclasses, strict YAML, flags. Never imports torch."""
