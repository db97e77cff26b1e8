"""Start `python -m pipelines …` elsewhere: on a running Ray cluster, under Slurm, on Kubernetes with KubeRay."""
