"What can go wrong with files, one operation after another: for tests of the writers"
import builtins, os, signal
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

WRITES = 'os.fsync os.replace os.link os.open os.mkdir builtins.open'.split()
CLEANS = 'os.unlink os.rmdir os.remove'.split()

class Death(BaseException):
    "Stands in for SIGKILL: afterwards the process does nothing more"

class Faults:
    "Counts operations on files under a folder; `at` of them does something else"
    def __init__(self, folder, at=None, fault=None, watch=lambda: None):
        self.folder,self.at,self.fault,self.watch = str(Path(folder).resolve()),at,fault,watch
        self.count,self.dead = 0,False

    def concerns(self, name, args):
        if name=='os.fsync': return True
        if name=='builtins.open' and (len(args)<2 or args[1][0]=='r'): return False
        return any(str(a).startswith(self.folder) for a in args[:2])

    def around(self, name, real):
        def op(*args, **kw):
            if not self.concerns(name, args): return real(*args, **kw)
            if self.dead: raise Death
            if name in CLEANS: return real(*args, **kw)
            self.count += 1
            return self.fault(self, real, args, kw) if self.count==self.at else self.done(real, args, kw)
        return op

    def done(self, real, args, kw):
        found = real(*args, **kw)
        self.watch()
        return found

@contextmanager
def faults(folder, at=None, fault=None, watch=lambda: None):
    f,patched = Faults(folder, at, fault, watch),[]
    for name in WRITES+CLEANS:
        module,attr = name.split('.')
        module = dict(os=os, builtins=builtins)[module]
        patched.append(mock.patch.object(module, attr, f.around(name, getattr(module, attr))))
    for p in patched: p.start()
    try: yield f
    finally:
        for p in patched: p.stop()

def refuse(number):
    "A fault: the system refuses the operation with an error of this number"
    def fault(f, real, args, kw): raise OSError(number, os.strerror(number))
    return fault

def die(f, real, args, kw):
    "A fault: the process dies after the operation"
    real(*args, **kw)
    f.dead = True
    raise Death

def kill(f, real, args, kw):
    "A fault: SIGKILL after the operation"
    real(*args, **kw)
    os.kill(os.getpid(), signal.SIGKILL)

def operations(folder, action):
    "How many operations on files an action takes"
    with faults(folder) as f: action()
    return f.count
