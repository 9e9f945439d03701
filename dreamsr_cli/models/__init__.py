"""Networks: one part of the paper per file (docs/method.md maps symbols to names)."""
