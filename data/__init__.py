"""What the project ships; `README.md` in this folder names sources, licences and checksums."""
