"""Hydra's configuration groups: values only. The classes that give them meaning stand beside the code they configure."""
