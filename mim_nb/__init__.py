__version__ = "0.1.0"

import importlib.util, sys

class _WhenTimmComes:
    "Registers our encoders with timm when timm is imported, and not before: that takes seconds, and not everybody who imports us needs it"
    def find_spec(self, name, path=None, target=None):
        if name!='timm': return
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None: return
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            from . import timm_models
        spec.loader.exec_module = exec_module
        return spec

if 'timm' in sys.modules: from . import timm_models
else: sys.meta_path.insert(0, _WhenTimmComes())
