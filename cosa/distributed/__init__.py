"""Ray: one run over many workers, and the cluster it runs on. The only room that knows Ray's runtime."""
