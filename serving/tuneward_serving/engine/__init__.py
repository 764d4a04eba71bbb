"""The embedded engine: transformers and PEFT behind OpenAI's routes and vLLM's adapter routes.

For CPUs and demos; vLLM is for real load. The layers, each knowing only those below:

server   uvicorn, the model's thread, start and end
routes   HTTP: one function a route; `schemas` and `errors` are what goes in and what comes out
batch    the thread that owns the model: continuous batches over sequences of different adapters
runner   one forward: base weights, adapters in slots
"""
