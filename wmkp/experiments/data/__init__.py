"""What training reads: datasets, records, images, and the batches that reach the device."""
