"""Settings of the whole suite."""

from hypothesis import settings

# The same examples at every run: a property that fails here fails everywhere. `database=None` leaves no files behind.
settings.register_profile("iia_ode", deadline=None, derandomize=True, max_examples=40, database=None)
settings.load_profile("iia_ode")
