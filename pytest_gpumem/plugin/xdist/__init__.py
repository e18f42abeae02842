"""The only place that knows xdist: its controller's scheduler, and what runs in its workers."""
