"""What the wmkp command runs: configs, data, models, loops, figures. It uses the library; the library never imports it."""

MIRROR_EVERY = {"wm": 1, "mkp": 16}  # engaged steps between mirror steps: a weight mirror must not lag behind W
