"""The course as a map with pictures: on the built front page, each table between `<!-- map -->` marks becomes cards with thumbnails.

thumbs.py NOTEBOOKS SITE"""
import base64, io, json, re, sys
from html import escape
from pathlib import Path
from PIL import Image

SIZE = 200,120                                # pixels
CHOSEN = {}                                   # notebook -> which of its figures, from 0, where the first is not the best

def page(nb): return re.sub(r'^\d+[a-z]*_', '', Path(nb).stem)+'.html'

def figures(nb):
    "The PNG figures of a notebook, in order"
    cells = json.loads(Path(nb).read_text())['cells']
    return [''.join(o['data']['image/png']) for c in cells for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]

def thumbnail(nb, to):
    "A small picture of one of a notebook's figures, its middle cut to shape; False if it has none"
    found = figures(nb)
    if not found: return False
    im = Image.open(io.BytesIO(base64.b64decode(found[CHOSEN.get(Path(nb).stem, 0)]))).convert('RGBA')
    w,h = im.size; scale = max(SIZE[0]/w, SIZE[1]/h)
    im = im.resize((max(SIZE[0], round(w*scale)), max(SIZE[1], round(h*scale))), Image.Resampling.LANCZOS)
    left = (im.width-SIZE[0])//2; im.crop((left, 0, left+SIZE[0], SIZE[1])).quantize(128).save(to, optimize=True)
    return True

def chapters(nbs):
    "`[(title, notebook, what one can do after it)]` for each table of the map in nbs/index.ipynb"
    text = '\n'.join(''.join(c['source']) for c in json.loads((nbs/'index.ipynb').read_text())['cells'] if c['cell_type']=='markdown')
    maps = re.findall(r'<!-- map -->(.*?)<!-- /map -->', text, re.S)
    return [re.findall(r'^\| \[(.+?)\]\((\S+?\.ipynb)\) \| (.+?) \|$', m, re.M) for m in maps]

def card(title, nb, line, nbs, site):
    to = site/'thumbs'/f'{page(nb)[:-5]}.png'
    image = f'<img src="thumbs/{to.name}" width="{SIZE[0]}" height="{SIZE[1]}" loading="lazy" alt="A figure of this chapter">' if thumbnail(nbs/nb, to) else '<span class="nothumb"></span>'
    return f'<li><a href="{page(nb)}">{image}<strong>{escape(title)}</strong></a><span>{escape(line)}</span></li>'

def put_map(nbs, site):
    "Write the thumbnails, and put the cards in the place of the tables of the built front page; how many there are"
    nbs,site = Path(nbs),Path(site); (site/'thumbs').mkdir(exist_ok=True)
    tables = ['<ul class="map">' + ''.join(card(*c, nbs, site) for c in t) + '</ul>' for t in chapters(nbs)]
    index = site/'index.html'; html = index.read_text(); left = iter(tables)
    html,n = re.subn(r'<!-- map -->.*?<!-- /map -->', lambda m: next(left), html, flags=re.S)
    if n!=len(tables): raise ValueError(f'the built front page has {n} maps and the notebook {len(tables)}: the marks <!-- map --> and <!-- /map --> were lost on the way')
    index.write_text(html)
    return sum(t.count('<li>') for t in tables)

if __name__=='__main__':
    if len(sys.argv)!=3: sys.exit(__doc__)
    print(put_map(*sys.argv[1:]), 'chapters on the map')
