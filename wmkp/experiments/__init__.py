"""What the wmkp command runs: configs, data, models, loops, figures. It uses the library; the library never imports it."""
