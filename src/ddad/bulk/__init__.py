"""Score archives of millions of photographs: cut into shards, on one machine, a cluster, Slurm, Spark or Dask."""
