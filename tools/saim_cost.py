"""Time and memory of a training step of SAIM, sorted and causal, and in the paper's form with masks: saim_cost.py OUT.json [--device cuda]

Time: one process, the same weights for all versions, one step of each in turn, over and over; so a machine that gets busier or
idler meanwhile does so for all of them. Memory: `saved_mb` is what autograd keeps for the backward pass, counted tensor by tensor;
`peak_mb` is the most that a process of its own needs in all, several times over, as the operating system or the GPU sees it."""
import argparse, json, math, subprocess, sys, time, torch, torch.nn.functional as F
from mim_nb.attention import attend, attention_weights
from mim_nb.saim import SAIM
from mim_nb.files import write_json
from mcbeit_memory import peak

class Masked(SAIM):
    "Tokens in image order; who may look at whom says a mask of (B,1,1+L,1+L) numbers a stream"
    @staticmethod
    def attend(b, x, context, mask): return attend(b.attn, b.norm1(x), b.norm1(context), mask)

    def block(self, b, x, context, mask):
        x = x + b.drop_path1(self.attend(b, x, context, mask))
        return x + b.drop_path2(b.mlp(b.norm2(x)))

    def masks(self, order):
        turn = torch.cat([torch.zeros_like(order[:,:1]), 1+order.argsort(1)], 1)
        later = turn[:,None,None,:]-turn[:,None,:,None]
        content,query = (torch.zeros(later.shape, device=order.device).masked_fill(later>k, -math.inf) for k in (0,-1))
        return content,query[:,:,1:]

    def encode(self, x, mask):
        e,(content,query) = self.encoder,self.masks(mask.order)
        h = torch.cat([e.cls_token.expand(len(x), -1, -1), e.patch_embed(x)], 1)+e.pos_embed
        g = e.pos_embed[:,1:].expand(len(x), -1, -1)
        step = len(e.blocks)//self.query_depth
        for i,b in enumerate(e.blocks):
            h = self.block(b, h, h, content)
            if (i+1)%step==0: g = self.block(self.query_blocks[i//step], g, h, query)
        return g

    def decode(self, z, mask): return self.head(self.encoder.norm(z))

class Scores(Masked):
    "The same with all scores and weights of attention written down, as the authors' code does"
    @staticmethod
    def attend(b, x, context, mask):
        a,(x,context) = b.attn,(b.norm1(x), b.norm1(context))
        (w,bias),d = (a.qkv.weight,a.qkv.bias),x.shape[-1]
        q,(k,v) = F.linear(x, w[:d], bias[:d]),F.linear(context, w[d:], bias[d:]).chunk(2, -1)
        q,k,v = (o.unflatten(-1, (a.num_heads, -1)).transpose(1,2) for o in (q,k,v))
        return a.proj((attention_weights(q, k, mask) @ v).transpose(1,2).flatten(2))

versions = {'sorted, causal': SAIM, 'masked': Masked, 'masked, scores written out': Scores}

def wait(device):
    if device=='cuda': torch.cuda.synchronize()

def setup(preset, batch, device):
    torch.manual_seed(0)
    m = SAIM(**SAIM.presets[preset]).to(device)
    return m,torch.rand(batch, m.in_chans, *m.img_size, device=device),m.sample_mask(batch)

def step(m, version, images, order, device):
    m.__class__ = versions[version]                                  # the same weights, used in another way
    with torch.autocast(device, torch.bfloat16, enabled=device=='cuda'): loss = m(images, order).loss
    loss.backward(); wait(device)
    m.zero_grad()
    return loss.item()

def times(preset, batch, device, rounds):
    "Seconds of each step, after one round that is not counted"
    args = setup(preset, batch, device); seconds = {v: [] for v in versions}
    for r in range(rounds+1):
        for v in (list(versions)[r%3:]+list(versions)[:r%3]):        # a different one begins each round
            wait(device); start = time.perf_counter()
            step(args[0], v, *args[1:], device)
            if r: seconds[v].append(round(time.perf_counter()-start, 3))
    return seconds

def memory(version, preset, batch, device):
    "One step: what autograd saves, and the peak"
    m,images,order = setup(preset, batch, device)
    weights,saved = {p.untyped_storage().data_ptr() for p in m.parameters()},{}
    def note(t):
        s = t.untyped_storage()
        if s.data_ptr() not in weights: saved[s.data_ptr()] = s.nbytes()
        return t
    m.__class__ = versions[version]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast(device, torch.bfloat16, enabled=device=='cuda'):
        loss = m(images, order).loss                                 # alive until here: no two of them share an address
    loss.backward(); wait(device)
    return dict(loss=loss.item(), saved_mb=sum(saved.values())/2**20, peak_mb=peak(device))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', help='JSON file for the result'); p.add_argument('--preset', default='base'); p.add_argument('--batch', type=int, default=8)
    p.add_argument('--rounds', type=int, default=4); p.add_argument('--repeats', type=int, default=2); p.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    p.add_argument('--version', choices=versions, help='the memory of this one: print it, and write nothing')
    a = p.parse_args()
    if a.version: print(json.dumps(memory(a.version, a.preset, a.batch, a.device))); sys.exit()
    from mim_nb.pretrain import machine             # here, so that the measured processes do not hold it
    args = ['--preset', a.preset, '--batch', str(a.batch), '--rounds', str(a.rounds), '--repeats', str(a.repeats), '--device', a.device]
    mem = {v: [] for v in versions}
    for _ in range(a.repeats):
        for v in versions: mem[v].append(json.loads(subprocess.run([sys.executable, __file__, a.out, *args, '--version', v], check=True, capture_output=True, text=True).stdout))
    runs = [dict(version=v, seconds=s, loss=mem[v][0]['loss'], saved_mb=mem[v][0]['saved_mb'], peak_mb=[o['peak_mb'] for o in mem[v]])
            for v,s in times(a.preset, a.batch, a.device, a.rounds).items()]
    write_json(a.out, dict(command=f"python tools/saim_cost.py {a.out} {' '.join(args)}", machine=machine(torch.device(a.device)), runs=runs))
