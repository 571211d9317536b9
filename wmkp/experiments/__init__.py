"""What the wmkp command runs: configs, data, models, loops, figures. A user of the library, never imported by it."""
