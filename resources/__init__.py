"""What a run borrows: the warehouse, the folders of files, the device with its model, the settings, the watcher.

Here belongs everything that touches disks, locks and devices on behalf of an asset; resources import `excise` and are
imported by assets. What an asset decides to store, and any science, does not belong here.
"""
