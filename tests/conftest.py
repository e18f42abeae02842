from hypothesis import settings

# What `make soak` asks for; tests that set their own number of examples keep it.
settings.register_profile("soak", max_examples=10_000, deadline=None)
