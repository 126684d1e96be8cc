"""Run exported transformers without torch."""
