"""From the queue to the stored order and its sinks: the RQ job, its steps, and the pool that runs the workers."""
