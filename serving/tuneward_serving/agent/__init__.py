"""The agent beside an engine: makes the engine's adapters equal the wanted list, and proves each.

It speaks vLLM's own API, so that vLLM or the embedded engine can be on the other side, and needs no operator:
after a restart of the engine it loads and proves again.
"""
