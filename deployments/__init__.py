"""The Ray Serve edge: app builder, HTTP ingress, the scheduler actor and the GPU replica actor."""
