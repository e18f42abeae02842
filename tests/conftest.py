from hypothesis import settings

# What `make soak` asks for; tests that set their own number of examples keep it.
# How long an example takes depends on what else the machine does.
settings.register_profile("regular", deadline=None)
settings.load_profile("regular")
settings.register_profile("soak", max_examples=10_000, deadline=None)
