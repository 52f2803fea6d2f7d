#!/bin/bash
# Finds which residues of chain A touch chain B, in every *.pdb of the folder it is started in.
#
# Two residues touch when any atom of the one lies within 5.5 Angstrom of any atom of the other: the
# distance that PRODIGY (Vangone and Bonvin 2015, doi:10.7554/eLife.07454) counts contacts by.
# Writes contacts.tsv (one line a pair) and summary.txt (one line a structure, printed as well).
#
# 2oob.pdb is entry 2OOB of the Protein Data Bank (doi:10.2210/pdb2OOB/pdb): Cbl-b's UBA domain with ubiquitin.
set -euo pipefail
shopt -s nullglob
export LC_ALL=C # a decimal point stays a point, whatever the machine's language

structures=(*.pdb)
if [ ${#structures[@]} -eq 0 ]; then
    echo "run.sh: there is no *.pdb file in $PWD: upload at least one beside run.sh" >&2
    exit 1
fi

printf 'structure\tchain_a\tresidue_a\tnumber_a\tchain_b\tresidue_b\tnumber_b\tdistance\n' >contacts.tsv
: >summary.txt

for structure in "${structures[@]}"; do
    # "./" keeps awk from taking a name such as a=b.pdb for an assignment, or -v.pdb for an option.
    awk -v cutoff=5.5 '
        function text(from, width,    field) {
            field = substr($0, from, width)
            gsub(/ /, "", field)
            return field
        }

        BEGIN {
            name = ARGV[1]
            sub(/^\.\//, "", name)
            sub(/\.pdb$/, "", name)
            limit = cutoff * cutoff
        }

        # Columns as in the PDB format 3.3, "ATOM". Only the first model, and of an atom that was
        # seen in several places (alternate locations) only the first, so that no pair comes twice.
        /^ENDMDL/ { exit }
        /^ATOM  / {
            chain = substr($0, 22, 1)
            if (chain != "A" && chain != "B") next
            number = text(23, 5) # with the insertion code, as in 52A
            if (seen[chain, number, text(13, 4)]++) next
            if (!((chain, number) in residue_name)) {
                residue_name[chain, number] = text(18, 3)
                residues[chain]++
                residue_number[chain, residues[chain]] = number
            }
            i = ++atoms[chain]
            x[chain, i] = substr($0, 31, 8) + 0
            y[chain, i] = substr($0, 39, 8) + 0
            z[chain, i] = substr($0, 47, 8) + 0
            residue_of[chain, i] = residues[chain]
        }

        # The nearest two atoms of each pair of residues, as a squared distance.
        function measure(    a, b, ax, ay, az, dx, dy, dz, squared, pair) {
            for (b = 1; b <= atoms["B"]; b++) {
                bx[b] = x["B", b]; by[b] = y["B", b]; bz[b] = z["B", b]
            }
            for (a = 1; a <= atoms["A"]; a++) {
                ax = x["A", a]; ay = y["A", a]; az = z["A", a]
                for (b = 1; b <= atoms["B"]; b++) {
                    dx = ax - bx[b]
                    if (dx > cutoff || dx < -cutoff) continue # most atoms are far apart: 3 times as fast
                    dy = ay - by[b]
                    dz = az - bz[b]
                    squared = dx * dx + dy * dy + dz * dz
                    if (squared > limit) continue
                    pair = residue_of["A", a] SUBSEP residue_of["B", b]
                    if (!(pair in nearest) || squared < nearest[pair]) nearest[pair] = squared
                }
            }
        }

        # Newton: some builds of busybox awk have no sqrt().
        function square_root(q,    guess, step) {
            guess = q > 1 ? q : 1
            for (step = 0; step < 20; step++) guess = (guess + q / guess) / 2
            return guess
        }

        function label(chain, i,    number) {
            number = residue_number[chain, i]
            return chain "\t" residue_name[chain, number] "\t" number
        }

        # In the order of the file, so that the table is the same with every awk.
        function report(    a, b, found, closest, closest_pair, line) {
            for (a = 1; a <= residues["A"]; a++) {
                for (b = 1; b <= residues["B"]; b++) {
                    if (!((a, b) in nearest)) continue
                    printf "%s\t%s\t%s\t%.2f\n", name, label("A", a), label("B", b),
                        square_root(nearest[a, b]) >> "contacts.tsv"
                    if (!found++ || nearest[a, b] < closest) {
                        closest = nearest[a, b]
                        closest_pair = label("A", a) " and " label("B", b)
                    }
                }
            }
            line = sprintf("%s: %d residue pairs of chains A and B lie within %.1f Angstrom", name, found, cutoff)
            if (found) {
                gsub(/\t/, " ", closest_pair)
                line = line sprintf("; closest are %s at %.2f Angstrom", closest_pair, square_root(closest))
            }
            print line
            print line >> "summary.txt"
        }

        END {
            if (!atoms["A"] || !atoms["B"]) {
                print "run.sh: " name ".pdb has no ATOM records of chain " (atoms["A"] ? "B" : "A") > "/dev/stderr"
                exit 1
            }
            measure()
            report()
        }
    ' "./$structure"
done
