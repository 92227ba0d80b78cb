"""`python -m easyeditor.survey`: the command in commands/survey.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("easyeditor.commands.survey", run_name="__main__", alter_sys=True)
