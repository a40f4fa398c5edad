"""From a repository id or a folder to filled parameters: files, name rules, strict loading."""
