"""The operator: watches FineTuneJobs, FineTunedModels and ModelServers, and makes the cluster follow them.

    event -> queue.add(key) -> reconcile(key):  observe (caches) -> decide (pure) -> ensure -> patch_status

`main` wires the parts, `handlers` and `informer` fill the caches and the queue, `jobs`, `models` and `servers` hold one
reconcile each, `decide` and `build` are pure, and `kube` alone talks to the API server.
"""
