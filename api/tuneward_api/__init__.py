"""The contract: every resource, file and word that two parts of Tuneward exchange.

The operator, the trainer, the serving agent and the command import this package and never each other.
It imports pydantic and yaml only, so that a pod or a script can read a plan without torch or Kubernetes.
"""
